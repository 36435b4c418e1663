"""What a :class:`Stream` keeps of the clients that came: a journal, and sums or Gram blocks."""
