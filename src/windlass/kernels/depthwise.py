"""stub"""
def takes(shape): return False
def forward(*a,**k): pass
backward_input=backward_weight=workspace_bytes=forward
