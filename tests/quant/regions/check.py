from claims import *
def run(random, folder):
    made = make(random, folder)
    if made is None: return "no way"
    is_opened(made)
    types_agree(made)
    conversions_are_fewest(made)
    return ("UNFUSED " if made.unfused else "") + "ok %d" % bool(made.plan.tensors) + " conv %d" % bool(File(made.path).conversions())
