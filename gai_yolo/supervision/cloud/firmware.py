"""Whose machine this is, as its firmware says: what a network says of that, anybody on it can say."""

from __future__ import annotations

from pathlib import Path

from gai_yolo.supervision.cloud.providers import Provider

DMI, HYPERVISOR = Path("/sys/class/dmi/id"), Path("/sys/hypervisor")
"""Linux; readable to all, in containers too."""
AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"
"""Asset tag of the chassis of Azure's machines. Their vendor is that of every Hyper-V."""
MOST_LETTERS = 256


def machine_vendor(dmi: Path = DMI, hypervisor: Path = HYPERVISOR) -> Provider | None:
    """The cloud that this machine is part of; None: none of the three, or the firmware's words cannot be read."""
    vendors = {_read(dmi / name) for name in ("sys_vendor", "bios_vendor", "board_vendor")}
    # Older machines of AWS are Xen's, with the vendor's name in the version and in the machine's number.
    if "amazon ec2" in vendors or "amazon" in _read(dmi / "bios_version") or _read(hypervisor / "uuid").startswith("ec2"):
        return "aws"
    if _read(dmi / "product_name") == "google compute engine":
        return "gcp"
    return "azure" if _read(dmi / "chassis_asset_tag") == AZURE_TAG else None


def _read(path: Path) -> str:
    """What stands there, in small letters; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MOST_LETTERS).decode(errors="replace").strip().casefold()
    except OSError:
        return ""
