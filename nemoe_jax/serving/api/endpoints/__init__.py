"""The paths of the API that take a body, one module each."""
