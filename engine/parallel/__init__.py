"""How ranks divide a replica."""
