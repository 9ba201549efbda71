"""Examples of networks and of a published comparison. Not part of the installed packages."""
