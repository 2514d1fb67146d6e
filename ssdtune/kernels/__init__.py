"""Arithmetic on the bytes of blocks: native code where there is a compiler, torch where there is none."""
