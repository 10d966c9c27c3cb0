"""Macs with Apple silicon: sizes of memory, and how fast it is read.

Bandwidths are the maker's numbers, GB/s, from the technical specifications of each chip on
support.apple.com and apple.com/newsroom (M1: Nov 2020 to Mar 2022; M2: Jun 2022 to Jun 2023; M3:
Oct 2023, Ultra Mar 2025; M4: May and Oct 2024; M5: Oct 2025, Pro and Max Mar 2026). Where a chip
comes in two, both are listed.
"""

from __future__ import annotations

# GiB of memory that Macs are sold with.
SIZES = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)

BANDWIDTH = {
    "M1": 68,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M1 Ultra": 800,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M2 Ultra": 800,
    "M3": 100,
    "M3 Pro": 150,
    "M3 Max, 30-core GPU": 300,
    "M3 Max, 40-core GPU": 400,
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max, 32-core GPU": 410,
    "M4 Max, 40-core GPU": 546,
    "M5": 153,
    "M5 Pro": 307,
    "M5 Max, 40-core GPU": 614,
}
