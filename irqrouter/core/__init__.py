"""The pure core: vectors, routes, cookies, operations. No descriptor, no system call."""
