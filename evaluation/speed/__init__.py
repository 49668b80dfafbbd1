"""Time, memory and arithmetic of this code base, measured beside other code in the same run."""
