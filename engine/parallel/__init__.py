"""How the ranks of a replica divide a model: mesh, process groups, timed collectives."""
