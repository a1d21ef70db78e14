"""How families of models write calls: one file each, read and written."""
