"""Tests of the kernel edge. Those that need ``/dev/kvm`` skip only where there is none; an unusable one fails them."""

from pathlib import Path

import pytest

needs_dev_kvm = pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="there is no /dev/kvm")
