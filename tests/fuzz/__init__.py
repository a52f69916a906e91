"""The fuzz run (`make fuzz`): damaged and strange files of all kinds, one command each."""
