"""headway-server of another protocol version: `python -m tests.system.other_version_server --config ...`."""

from __future__ import annotations

from protocol import versions


def main() -> None:
    """Change the version before anything that uses it is imported."""
    versions.PROTOCOL_VERSION += 1  # type: ignore[misc]
    from rollout_server.__main__ import main as server_main

    server_main()


if __name__ == "__main__":
    main()
