"""What the service may be told: one TOML file, every key of which has a default."""

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one VM may take, so that no VM takes what is another's."""

    #: VMs attached at a time, whoever's.
    vms: int = 256
    #: Vectors of a VM.
    vectors: int = 4096
    #: Memory regions of a VM.
    regions: int = 64
    #: Frames of a VM in a second; above it the service reads no more of its frames until the second is over.
    frames_per_second: int = 5000
    #: Bytes of a VM's frames in a second, likewise.
    bytes_per_second: int = 16 << 20
