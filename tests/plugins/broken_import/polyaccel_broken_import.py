"""Fails the way a plugin without its vendor's libraries does."""

raise ImportError("libexample_driver.so.2: cannot open shared object file: No such file or directory")
