"""Cache a table of pandas: the second call gets the same table, dtypes and index included, which it may change."""

import asyncio
import os

import numpy as np
import pandas as pd

from aiokv import AsyncKVStore, kv_cached, set_default_store


# The annotation says what comes back. Needs `pip install 'aiokv[pandas]'`.
@kv_cached(ttl=3600)
async def sales(year: int) -> pd.DataFrame:
    print(f"computing {year}")
    days = pd.date_range(f"{year}-01-01", f"{year}-12-31", tz="Europe/Oslo", name="day")
    table = pd.DataFrame(
        {"sold": np.arange(len(days)) % 7, "shop": pd.Categorical(["north", "south"] * len(days))[: len(days)]}, days
    )
    table.attrs["unit"] = "pieces"
    return table


# Tables and arrays are arguments, too: equal content, equal key.
@kv_cached(ttl=3600)
async def weekly(table: pd.DataFrame) -> pd.Series:
    return table["sold"].resample("W").sum()


async def main() -> None:
    os.environ.setdefault("AIOKV_URL", "memory://")
    async with AsyncKVStore("sales") as store:
        set_default_store(store)
        await sales.invalidate(2024)
        first = await sales(2024)
        second = await sales(2024)
        pd.testing.assert_frame_equal(first, second)
        print(second.dtypes.to_dict(), second.index.tz, second.attrs)
        # Nobody else has this table.
        second["sold"] = 0
        assert (await sales(2024))["sold"].sum() > 0
        await weekly(first)
        await weekly(await sales(2024))
        print(f"computed {sales.info().computations} table and {weekly.info().computations} summary at most once each")


asyncio.run(main())
