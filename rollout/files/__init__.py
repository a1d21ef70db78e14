"""Files of lines and of tensors that callers name, and disks that may be full."""
