"""Commands of `jaxsoup` with files of their own."""
