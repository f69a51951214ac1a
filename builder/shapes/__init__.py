"""The miniature SDXL of coloured shapes: its data, its training and the judge of its pictures."""
