"""How fast every stage of the data preparation is, next to what one would use instead."""
