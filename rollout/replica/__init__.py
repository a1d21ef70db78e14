"""One engine behind one interface, in this process or in a spawned one, and its leader."""
