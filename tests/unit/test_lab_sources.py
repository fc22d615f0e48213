# SPDX-License-Identifier: BSD-3-Clause
"""Which mirror the lab asks, from a machine's package sources."""

from pathlib import Path

from vfio_user.client.qemu.apt import not_debian
from vfio_user.client.qemu.sources import (
    Source,
    main_source,
    os_release,
    parse_deb822,
    parse_one_line,
    read_sources,
    stanza,
)

ONE_LINE = """\
# deb http://off.example/debian bookworm main
deb [arch=amd64 Signed-By=/k.gpg] http://one.example/debian bookworm main contrib  # here
deb-src http://one.example/debian bookworm main
"""
DEB822 = """\
# a comment
Types: deb deb-src
URIs: http://two.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abcd
Architectures: amd64

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
Enabled: no

Types: deb-src
URIs: http://src.example/debian
Suites: bookworm
Components: main
"""
KEY = "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abcd"


def test_one_line_format() -> None:
    assert list(parse_one_line(ONE_LINE)) == [
        Source("http://one.example/debian", "bookworm", ("main", "contrib"), (("signed-by", "/k.gpg"),)),
    ]


def test_deb822_format_keeps_an_embedded_key() -> None:
    options = (("signed-by", KEY),)
    assert list(parse_deb822(DEB822)) == [
        Source("http://two.example/debian", suite, ("main",), options)
        for suite in ("bookworm", "bookworm-updates")
    ]


def test_the_own_release_comes_first_and_third_parties_never() -> None:
    sources = [
        Source("http://else.example/", "nodistro", ("main",)),
        Source("cdrom:[Debian]/", "bookworm", ("main",)),
        Source("http://a.example/", "stable", ("main",)),
        Source("http://b.example/", "bookworm", ("contrib",)),
        Source("http://c.example/", "bookworm", ("main",)),
    ]
    assert main_source(sources, "bookworm") == sources[4]
    assert main_source(sources[:4], "bookworm") == sources[2]
    assert main_source(sources[:2], "bookworm") is None


def test_a_stanza_for_other_suites_is_read_back() -> None:
    text = stanza(next(parse_deb822(DEB822)), ["trixie", "trixie-backports"], "deb deb-src")
    assert [(s.uri, s.suite, s.options) for s in parse_deb822(text)] == [
        ("http://two.example/debian", suite, (("signed-by", KEY),))
        for suite in ("trixie", "trixie-backports")
    ]


def test_files_of_both_formats_are_found(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(ONE_LINE)
    (tmp_path / "sources.list.d/debian.sources").write_text(DEB822)
    (tmp_path / "sources.list.d/old.list.disabled").write_text(ONE_LINE)
    assert [s.uri for s in read_sources(tmp_path)] == ["http://one.example/debian"] + [
        "http://two.example/debian"
    ] * 2
    assert read_sources(tmp_path / "none") == []


def test_other_systems_are_told_what_they_need() -> None:
    debian = os_release(
        'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\nVERSION_CODENAME=bookworm\n'
    )
    assert debian["VERSION_CODENAME"] == "bookworm"
    assert not_debian(debian, "x86_64") == ""
    assert "Debian GNU/Linux 12 (bookworm), aarch64" in not_debian(debian, "aarch64")
    assert "unknown system" in not_debian({}, "x86_64")
