"""The losses beside their peers on a GPU: `make bench-gpu`. README.md beside this file says what is run."""
