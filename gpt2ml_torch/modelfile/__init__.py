"""The one file: its format, its reader and its writer."""
