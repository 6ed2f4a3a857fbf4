"""A response run again and compared bit by bit: the bundle that it is recorded in, and what is made of it."""
