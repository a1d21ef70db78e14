"""Training recipes: one page an algorithm, and the parts those pages are made of."""
