"""One page that shows what a server or a training run does, over any source of figures."""
