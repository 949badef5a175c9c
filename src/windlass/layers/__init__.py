"""PyTorch modules and operators of Windlass: convolution by plan."""
