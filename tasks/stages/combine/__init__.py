"""Stage `combine`: several policies made into one."""
