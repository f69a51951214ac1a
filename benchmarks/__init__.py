"""Measurements that anyone can repeat; each is a program with --help."""
