"""The numbers: every optimizer, option and number format against float64, torch and golden data."""
