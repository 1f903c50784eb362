"""An example of a package that adds to EyeTune from outside: docs/extending.md explains it."""
