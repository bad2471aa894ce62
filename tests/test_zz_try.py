import time
def test_a(folder):
    t=time.time(); r = folder.train().ok(); print(time.time()-t); print(r.out)
    t=time.time(); r = folder.train(dtype='bfloat16', dropout=.1).ok(); print(time.time()-t)
    t=time.time(); r = folder.train(init_from='resume', n_layer=3).refused(); print(time.time()-t); print(r.out)
    t=time.time(); r = folder.train_two().ok(); print(time.time()-t); print(r.out)
    t=time.time(); r = folder.sample(max_new_tokens=20); print(time.time()-t); print(r.out)
