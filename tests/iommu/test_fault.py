from irqrouter.iommu.amdvi import AmdviFault, Cause
from irqrouter.iommu.fault import Fault, NotAnInterrupt, RecordedFault
from irqrouter.iommu.vtd import FaultReason, VtdFault
from irqrouter.x86.msi import Message


def test_record_is_the_units_own_and_none_where_hardware_has_none() -> None:
    vtd = VtdFault(requester=0x18, recorded=True, reason=FaultReason.NOT_PRESENT, index=5)
    assert vtd.record() == vtd.frcd() == (0x0005000000000000, 0x8000002200000018)
    amdvi = AmdviFault(requester=0x18, recorded=True, cause=Cause.BEYOND_DEVICE_TABLE, address=0xFEE00000)
    assert amdvi.record() == amdvi.event()
    assert AmdviFault(requester=0x18, recorded=False, cause=Cause.TYPE_NOT_PASSED, address=0).record() is None
    assert NotAnInterrupt(requester=0x18, recorded=False, message=Message(0, 0)).record() is None
    assert Fault(requester=0x18, recorded=True).record() is None


def test_recorded_fault_gives_back_the_record_it_was_given() -> None:
    fault = RecordedFault(requester=0x18, recorded=True, low=1 << 63, high=2)
    assert fault.record() == (1 << 63, 2)
    assert fault.describe() == "00:03.0: blocked elsewhere, record 0000000000000002:8000000000000000"
