"""Where texts stand in their grammars, so that texts that may go on alike share one mask."""
