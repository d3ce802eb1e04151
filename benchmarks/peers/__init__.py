"""A race of this engine against what people use today: `fedra bench peers`."""
