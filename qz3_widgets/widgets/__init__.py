"""The notebook's view: thin widgets over the functions of the other packages."""
