"""What is proved of a context, a table or a sequence, and how far that reaches."""
