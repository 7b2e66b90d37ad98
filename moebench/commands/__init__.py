"""The commands of moebench, one a file."""
