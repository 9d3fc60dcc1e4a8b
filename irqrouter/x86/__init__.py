"""x86 interrupt messages and controllers, bit level and pure."""
