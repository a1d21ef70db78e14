"""Files of lines and of tensors, and disks that are full."""
