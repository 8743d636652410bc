"""What goes in: prompts and pictures, read from files of the user's."""
