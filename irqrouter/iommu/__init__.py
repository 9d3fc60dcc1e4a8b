"""VT-d and AMD-Vi interrupt remapping, bit level and pure."""
