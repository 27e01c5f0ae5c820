/* A disk that fills up, cannot be written to, cannot be read, or is slow.
 *
 * cc -shared -fPIC -o disk.so disk.c -ldl;  LD_PRELOAD=./disk.so python tests/torture/processes.py
 *
 * torture_full(n): no more than n bytes are written to files, and then ENOSPC.
 * torture_locked(folder, n): after n changes below that folder all further ones get EROFS.
 * torture_read(folder, n, how): after n reads below that folder all further ones get EIO (how 1), or one byte fewer
 * than was asked for (how 2).
 * torture_slow(folder, us): each read, write and change below that folder takes so many microseconds more; so it does
 * where TORTURE_SLOW is "us folder" in the environment. Pipes, sockets, terminals and the standard streams are left alone, as is the cache of
 * what is mapped: reading and writing through mmap is not seen.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long left = -1; /* bytes; -1: the disk is large */

void torture_full(long bytes) { left = bytes; }

static int is_file(int fd) {
  struct stat status;
  return left >= 0 && fd > 2 && fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
}

/* How many of `count` bytes fit; -1 and ENOSPC where none does. */
static ssize_t room(int fd, size_t count) {
  if (!is_file(fd) || count == 0) return (ssize_t)count;
  if (left == 0) {
    errno = ENOSPC;
    return -1;
  }
  return (ssize_t)count < left ? (ssize_t)count : left;
}

static ssize_t spent(int fd, ssize_t done) {
  if (done > 0 && is_file(fd)) left -= done < left ? done : left;
  return done;
}

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))

static char slow[512];
static long waits = 0; /* microseconds */

void torture_slow(const char *folder, long microseconds) {
  snprintf(slow, sizeof slow, "%s", folder);
  waits = microseconds;
}

__attribute__((constructor)) static void from_environment(void) {
  const char *said = getenv("TORTURE_SLOW");
  char *folder;
  long microseconds = said ? strtol(said, &folder, 10) : 0;
  if (microseconds > 0 && *folder == ' ') torture_slow(folder + 1, microseconds);
}

static void waited(const char *path) {
  if (waits && path && strncmp(slow, path, strlen(slow)) == 0) usleep((useconds_t)waits);
}

/* The name of an open file; empty where it has none. */
static const char *name_of(int fd, char *path, size_t size) {
  char name[64];
  snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(name, path, size - 1);
  path[length < 0 ? 0 : length] = 0;
  return path;
}

static void waited_for(int fd) {
  char path[512];
  if (waits && fd > 2) waited(name_of(fd, path, sizeof path));
}

ssize_t write(int fd, const void *data, size_t count) {
  waited_for(fd);
  ssize_t fits = room(fd, count);
  return fits < 0 ? -1 : spent(fd, REAL("write", ssize_t(*)(int, const void *, size_t))(fd, data, (size_t)fits));
}

ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at) {
  waited_for(fd);
  ssize_t fits = room(fd, count);
  if (fits < 0) return -1;
  return spent(fd, REAL("pwrite64", ssize_t(*)(int, const void *, size_t, off64_t))(fd, data, (size_t)fits, at));
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  waited_for(fd);
  size_t whole = 0;
  for (int i = 0; i < count; i++) whole += parts[i].iov_len;
  ssize_t fits = room(fd, whole);
  if (fits < 0) return -1;
  if ((size_t)fits < whole) return write(fd, parts[0].iov_base, parts[0].iov_len);
  return spent(fd, REAL("writev", ssize_t(*)(int, const struct iovec *, int))(fd, parts, count));
}

ssize_t sendfile64(int out, int in, off64_t *at, size_t count) {
  waited_for(out);
  ssize_t fits = room(out, count);
  if (fits < 0) return -1;
  return spent(out, REAL("sendfile64", ssize_t(*)(int, int, off64_t *, size_t))(out, in, at, (size_t)fits));
}

ssize_t sendfile(int out, int in, off_t *at, size_t count) { return sendfile64(out, in, (off64_t *)at, count); }

/* What is below a folder. */

static char locked[512], broken[512];
static long changes = 0, reads = 0;
static int how = 0;

void torture_locked(const char *folder, long after) {
  snprintf(locked, sizeof locked, "%s", folder);
  changes = after;
}

void torture_read(const char *folder, long after, int failure) {
  snprintf(broken, sizeof broken, "%s", folder);
  reads = after;
  how = failure;
}

static int below(const char *folder, const char *path) {
  return folder[0] && path && strncmp(path, folder, strlen(folder)) == 0;
}

/* Whether a change of this name is refused. */
static int refused(const char *path) {
  char whole[1024] = "", here[512];
  if ((!locked[0] && !waits) || !path) return 0;
  if (path[0] != '/' && getcwd(here, sizeof here)) snprintf(whole, sizeof whole, "%s/", here);
  strncat(whole, path, sizeof whole - strlen(whole) - 1);
  waited(whole);
  if (!below(locked, whole)) return 0;
  if (changes-- > 0) return 0;
  errno = EROFS;
  return 1;
}

#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & (O_CREAT | O_TRUNC)))

int open64(const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = va_arg(rest, mode_t);
  va_end(rest);
  if (WRITES(flags) && refused(path)) return -1;
  return REAL("open64", int (*)(const char *, int, mode_t))(path, flags, mode);
}

FILE *fopen64(const char *path, const char *mode) {
  if (strpbrk(mode, "wa+") && refused(path)) return NULL;
  return REAL("fopen64", FILE *(*)(const char *, const char *))(path, mode);
}

FILE *fopen(const char *path, const char *mode) { return fopen64(path, mode); }

int rename(const char *old, const char *new) {
  if (refused(new)) return -1;
  return REAL("rename", int (*)(const char *, const char *))(old, new);
}

int mkdir(const char *path, mode_t mode) {
  if (refused(path)) return -1;
  return REAL("mkdir", int (*)(const char *, mode_t))(path, mode);
}

int unlink(const char *path) {
  if (refused(path)) return -1;
  return REAL("unlink", int (*)(const char *))(path);
}

int rmdir(const char *path) {
  if (refused(path)) return -1;
  return REAL("rmdir", int (*)(const char *))(path);
}

/* How many of `count` bytes may be read; -1 and EIO where none may. */
static ssize_t readable(int fd, size_t count) {
  char path[512];
  waited_for(fd);
  if (!how || count == 0 || fd < 3) return (ssize_t)count;
  if (!below(broken, name_of(fd, path, sizeof path)) || reads-- > 0) return (ssize_t)count;
  if (how == 2) return count > 1 ? (ssize_t)count - 1 : (ssize_t)count;
  errno = EIO;
  return -1;
}

ssize_t read(int fd, void *data, size_t count) {
  ssize_t some = readable(fd, count);
  return some < 0 ? -1 : REAL("read", ssize_t(*)(int, void *, size_t))(fd, data, (size_t)some);
}

ssize_t pread64(int fd, void *data, size_t count, off64_t at) {
  ssize_t some = readable(fd, count);
  return some < 0 ? -1 : REAL("pread64", ssize_t(*)(int, void *, size_t, off64_t))(fd, data, (size_t)some, at);
}

ssize_t pread(int fd, void *data, size_t count, off_t at) { return pread64(fd, data, count, (off64_t)at); }
