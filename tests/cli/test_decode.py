import argparse
import json

import pytest

from irqrouter.cli import decode


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="irqrouter")
    decode.add_parser(parser.add_subparsers(required=True))
    return decode.run(parser.parse_args(["decode", *arguments]))


# What each invocation must say among its lines, and its last line in full or in part.
CASES = [
    ("msi FEE000B8 0", "shv", "IRTE 0x5"),
    ("msi 0xfee0003c 0", "handle_15", "IRTE 0x8001"),
    ("msi FEEFFFF4 DEADBEEF", "shv", "IRTE 0xffff; the data is ignored"),
    ("msi FEEFFFFC 1", "subhandle", "index 0x10000: fault 21h"),
    ("msi FEE000B8 10000", "reserved", "fault 20h"),
    ("msi FEE03000 41", "format: compatibility", "vector 0x41 to APIC 0x3 (physical), fixed, edge"),
    ("msi FEE23020 41", "ext_destination", "00000100:FEE23000/00000041: vector 0x41 to APIC 0x123"),
    ("msi FEE00000 400", "delivery mode: NMI", "AMD-Vi: NMI; with DM=1"),
    ("msi 1000 0", "prefix", "no interrupt"),
    ("irte 0000030000410009 0000000000040018", "requester id under SQ", "from 00:03.0: FEE03008/00004041"),
    ("irte 0000000300410009 40018 --eime", "dst", "EIME=1, from 00:03.0: FEE03008/00004041"),
    ("irte 0000000300410009 40018", "dst", "EIME=0, from 00:03.0: 24h"),
    ("irte 0000020000600009 80204", "bus range", "from 02:00.0: FEE02008/00004060"),
    ("irte 0000020000600009 80204 --requester 05:02.0", "bus range", "from 05:02.0: 26h"),
    ("irte 2345678000418001 100040018 --eime", "pda_63_32", "or is posted"),
    ("irte 2 0", "fpd", "22h: the IRTE is not present (not recorded)"),
    ("irta 1000080F", "eime", "65536 entries at 0x10000000, x2APIC mode"),
    ("descriptor 0000004018000014", "index-selective", "makes stale: cookies 0x40-0x47"),
    ("descriptor 4", "granularity: global", "makes stale: every cookie"),
    ("descriptor 0000000200000025 1000", "status write", "no interrupt translation becomes stale"),
    ("descriptor 24", "reserved", "FSTS.IQE"),
    ("descriptor 1", "", "descriptor type 0x1: not about interrupts"),
    ("frcd 1234000000000000 8000002200000018", "fault reason", "00:03.0: 22h: the IRTE is not present, index 0x1234"),
    ("frcd 0 0", "fr", "holds no record"),
    ("frcd 0 8000000100000018", "fr", "1h is no interrupt-remapping fault"),
    ("dte 2000000012345013", "remapped", "512 entries at 0x12345000"),
    ("dte E700000012345013", "NMI passes", "512 entries at 0x12345000; NMI, INIT, ExtINT pass"),
    ("dte 0 0 2000000012345017 0", "int_tab_len", "2048 entries"),
    ("dte 1", "target abort", "fixed interrupts are aborted"),
    ("dte 1000000000000001", "unmapped", "fixed interrupts pass unmapped"),
    ("dte 3000000000000001", "reserved", "IntCtl is reserved"),
    ("dte 2000000000000019", "int_tab_len", "IntTabLen is above 11"),
    ("dte 0010000000000001", "reserved", "reserved bits are set"),
    ("dte 0", "iv", "interrupts pass unmapped"),
    ("amd-irte 00410301", "remap_en", "FEE03000/00004041"),
    ("amd-irte FFFFFFFE", "sup_iopf", "IRTE.RemapEn is 0 (SupIOPF: not logged)"),
    ("amd-irte 12345601 0A00000000000042 --xt", "destination_31_24", "0A123400:FEE56000/00004042"),
    ("amd-irte 00001234000005C5 0000000012345041", "ga_tag", "IRTE.GuestMode is set without GAM"),
    ("command 50000000000000A0", "INVALIDATE_INTERRUPT_TABLE", "makes stale: cookie 0xa0"),
    ("command 1000000000001001 1", "store_data", "no interrupt translation becomes stale"),
    ("command 5000000000010000", "reserved", "ILLEGAL_COMMAND_ERROR"),
    ("command 3000000000000000", "", "command 0x3: not about interrupts"),
    ("event 2098000000000018 FEE00000", "IO_PAGE_FAULT", "interrupt request of 00:03.0 at 0xfee00000"),
    ("rte 002100000000A009", "active low", "FEE00210/00008009"),
    ("rte 000700000001A815", "masked", "unmasked it would send FEE00074/00008015"),
    ("rte 0300000000000041", "format: compatibility", "vector 0x41 to APIC 0x3"),
    ("callback 9", "type: GSI", "GSI 9"),
    ("callback 30", "type: GSI", "no callback"),
    ("callback 2F --gsis 48", "type: GSI", "GSI 47"),
    ("callback 0100000000001803", "INTD", "INTD of 00:03"),
    ("callback 0200000000000093", "type: vector", "vector 0x93"),
]


@pytest.mark.parametrize(("line", "field", "result"), CASES, ids=[case[0] for case in CASES])
def test_decode_explains_fields_and_result(
    line: str, field: str, result: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*line.split()) == 0
    printed = capsys.readouterr()
    fields = [text for text in printed.out.splitlines() if not text.startswith("=>")]
    results = [text for text in printed.out.splitlines() if text.startswith("=>")]
    assert field in "\n".join(fields)
    assert any(result in text for text in results), printed.out
    assert not printed.err


@pytest.mark.parametrize("line", [case[0] for case in CASES])
def test_decode_json_holds_what_the_plain_text_says(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*line.split()) == 0
    plain = capsys.readouterr().out
    assert run(*line.split(), "--json") == 0
    explained = json.loads(capsys.readouterr().out)
    assert [f"=> {text}" for text in explained["result"]] == [
        text for text in plain.splitlines() if text.startswith("=>")
    ]
    for section in explained["sections"]:
        assert section["title"] in plain
        assert all(set(field) == {"bits", "name", "value", "meaning"} for field in section["fields"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("msi hello 0", "ADDRESS 'hello': is not a hexadecimal number"),
        ("msi 1FEE0000000000000 0", "must fit 64 bits"),
        ("msi FEE00000 100000000", "must fit 32 bits"),
        ("msi 1FEE00010 0", "a remappable request has no high dword"),
        ("irte 0 10000000000000000", "must fit 64 bits"),
        ("irte 0 0 --requester 3", "must be written bus:device.function"),
        ("irte 0 0 --requester 00:20.0", "must lie within ff:1f.7"),
        ("dte 0 0", "not 2"),
        ("amd-irte 100000000", "must fit 32 bits"),
        ("callback 9 --gsis many", "must be a decimal number"),
        ("callback 9 --gsis -1", "must be a decimal number"),
    ],
)
def test_decode_bad_input_gives_one_line_and_exit_code_2(
    line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*line.split()) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.count("\n") == 1
    assert says in printed.err
    assert printed.err.startswith(f"irqrouter decode {line.split(maxsplit=1)[0]}: ")


def test_decode_help_shows_examples_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    prefix = "irqrouter decode "
    examples = [text.strip() for text in capsys.readouterr().out.splitlines() if text.strip().startswith(prefix)]
    assert len(examples) >= 9
    for example in examples:
        words = example.removeprefix(prefix).split("  ")[0].split()
        assert run(*words) == 0, example
