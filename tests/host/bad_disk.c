// A disk that goes bad: put in LD_PRELOAD, call number BAD_CALL on a file below the folder
// BAD_FOLDER fails with EIO, of all the calls that write one, bring it to the disk or name it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;

static int fails(const char* path) {
  const char *folder = getenv("BAD_FOLDER"), *number = getenv("BAD_CALL");
  if (!folder || !number || strncmp(path, folder, strlen(folder))) return 0;
  if (atomic_fetch_add(&calls, 1) + 1 != atol(number)) return 0;
  errno = EIO;
  return 1;
}

static int handle_fails(int handle) {
  char link[64], path[PATH_MAX] = {0};
  snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
  return readlink(link, path, PATH_MAX - 1) > 0 && fails(path);
}

#define OF_HANDLE(type, name, arguments, ...)                                   \
  type name arguments {                                                         \
    if (handle_fails(handle)) return -1;                                        \
    return ((type(*) arguments)dlsym(RTLD_NEXT, #name))(__VA_ARGS__);           \
  }
#define OF_PATH(name, arguments, ...)                                           \
  int name arguments {                                                          \
    if (fails(path)) return -1;                                                 \
    return ((int(*) arguments)dlsym(RTLD_NEXT, #name))(__VA_ARGS__);            \
  }

OF_HANDLE(ssize_t, write, (int handle, const void* from, size_t size), handle, from, size)
OF_HANDLE(ssize_t, writev, (int handle, const struct iovec* from, int n), handle, from, n)
OF_HANDLE(ssize_t, pwrite64, (int handle, const void* from, size_t size, off64_t at),
          handle, from, size, at)
OF_HANDLE(int, fsync, (int handle), handle)
OF_PATH(rename, (const char* path, const char* to), path, to)
OF_PATH(link, (const char* path, const char* to), path, to)
OF_PATH(mkdir, (const char* path, mode_t mode), path, mode)
int renameat2(int at, const char* path, int to_at, const char* to, unsigned flags) {
  if (fails(path)) return -1;
  return ((int (*)(int, const char*, int, const char*, unsigned))dlsym(RTLD_NEXT, "renameat2"))(
      at, path, to_at, to, flags);
}
