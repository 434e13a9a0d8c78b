"""The version of this project: of the package, and in everything that it writes."""

VERSION = "0.1.0"
