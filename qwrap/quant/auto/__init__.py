"""Method "auto": ranges by trial on a few samples."""
