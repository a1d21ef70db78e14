"""What the next step computes, and on which pages."""
