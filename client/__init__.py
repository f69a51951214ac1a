"""What people use: the command `sdxl` and the page. Of the worker they know its HTTP interface."""
