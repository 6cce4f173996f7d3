! tessera: the Fortran face of tessera.h, where everything is explained. Compile this file with your program (a .mod file would fit one
! compiler only) and link with -ltessera.
!
! - Types begin with `size`: set it, `o%size = c_sizeof(o)`. Other fields have the defaults of TESSERA_OPTIONS and so on.
! - mpi_comm takes a communicator of `use mpi` as it is (of mpi_f08: its %MPI_VAL).
! - Texts end with c_null_char and are passed as c_loc of a `target`. The library copies them.
! - Shapes are in C's order, last index fastest: an array declared a(7, 1001) is the tensor [1001, 7].
! - Unsigned 64-bit numbers are integer(c_int64_t): the C value UINT64_MAX is -1.
! - Arrays given as data must be `target` (and contiguous, or given with strides) and must not be reallocated while a state holds them.
! - Functions return c_null_ptr or an error: tessera_message(st) is its text; tessera_status_free(st) when done with it.
module tessera
  use, intrinsic :: iso_c_binding
  implicit none
  public

  integer(c_int), parameter :: TESSERA_OK = 0, TESSERA_INVALID = 1, TESSERA_NOT_FOUND = 2, TESSERA_EXISTS = 3, &
    TESSERA_NO_MEMORY = 4, TESSERA_IO = 5, TESSERA_NO_SPACE = 6, TESSERA_CORRUPT = 7, TESSERA_UNAVAILABLE = 8, &
    TESSERA_TIMEOUT = 9, TESSERA_CANCELLED = 10, TESSERA_PEER = 11, TESSERA_DEVICE = 12, TESSERA_UNSUPPORTED = 13, &
    TESSERA_INTERNAL = 14
  integer(c_int), parameter :: TESSERA_F64 = 1, TESSERA_F32 = 2, TESSERA_F16 = 3, TESSERA_BF16 = 4, TESSERA_F8E4M3 = 5, &
    TESSERA_F8E5M2 = 6, TESSERA_E8M0 = 7, TESSERA_U4X2 = 8, TESSERA_I64 = 9, TESSERA_I32 = 10, TESSERA_I16 = 11, &
    TESSERA_I8 = 12, TESSERA_U64 = 13, TESSERA_U32 = 14, TESSERA_U16 = 15, TESSERA_U8 = 16, TESSERA_BOOL = 17
  integer(c_int), parameter :: TESSERA_IDLE = 0, TESSERA_CAPTURE = 1, TESSERA_WRITE = 2, TESSERA_VOTE = 3, TESSERA_COMMIT = 4
  integer(c_int64_t), parameter :: TESSERA_NEWEST = -1
  integer(c_int), parameter :: TESSERA_ALLOW_MISSING = 1, TESSERA_ALLOW_UNEXPECTED = 2, TESSERA_ALLOW_MISSHAPEN = 4, &
    TESSERA_LENIENT = 7, TESSERA_ALLOW_CAST = 8
  integer(c_int), parameter :: TESSERA_AS_GIVEN = 0, TESSERA_MERGE = 1, TESSERA_GATHER = 2
  integer(c_int), parameter :: TESSERA_MISSING = 1, TESSERA_UNEXPECTED = 2, TESSERA_MISSHAPEN = 3

  type, bind(c) :: tessera_options
    integer(c_size_t) :: size = 0
    type(c_ptr) :: url = c_null_ptr
    integer(c_int) :: mpi_comm = -1, read_only = 0, keep_last = 0, rewind = 0
    integer(c_int64_t) :: staging_bytes = 0, chunk_bytes = 0
    integer(c_int) :: writers = 0
    integer(c_int32_t) :: lease_seconds = 0
    type(c_ptr) :: build = c_null_ptr
    integer(c_int) :: mesh(5) = 0
    type(c_funptr) :: warn = c_null_funptr
    type(c_ptr) :: warn_arg = c_null_ptr
    integer(c_int64_t) :: keep_every = 0
    integer(c_int) :: keep_best = 0, keep_lowest = 0
    type(c_ptr) :: keep_metric = c_null_ptr
    integer(c_int) :: view = 0
    integer(c_int) :: reference_frozen = 0
    integer(c_int) :: irregular = 0
  end type

  type, bind(c) :: tessera_tensor
    integer(c_size_t) :: size = 0
    type(c_ptr) :: part = c_null_ptr, name = c_null_ptr
    integer(c_int) :: dtype = 0, ndim = 0
    integer(c_int64_t) :: shape(8) = 0, offset(8) = 0, length(8) = 0
    integer(c_int64_t) :: run_begin = 0, run_end = 0
    type(c_ptr) :: stride = c_null_ptr, data = c_null_ptr
    integer(c_int) :: frozen = 0
    type(c_ptr) :: alias_of = c_null_ptr
    type(c_ptr) :: reference = c_null_ptr ! c_loc of a tessera_reference
  end type

  type, bind(c) :: tessera_reference
    integer(c_size_t) :: size = 0
    type(c_ptr) :: url = c_null_ptr
    integer(c_int64_t) :: step = 0
    type(c_ptr) :: part = c_null_ptr, name = c_null_ptr
  end type

  type, bind(c) :: tessera_tick_io ! struct tessera_tick
    integer(c_size_t) :: size = 0
    integer(c_int32_t) :: flag(4) = 0
    integer(c_int) :: phase = 0
    integer(c_int64_t) :: committed = -1
  end type

  type, bind(c) :: tessera_load_options ! parts, names, roles: c_loc of an array of c_ptr, the last one c_null_ptr
    integer(c_size_t) :: size = 0
    type(c_ptr) :: parts = c_null_ptr, names = c_null_ptr, roles = c_null_ptr
    integer(c_int) :: allow = 0
  end type

  type, bind(c) :: tessera_step
    integer(c_size_t) :: size = 0
    integer(c_int64_t) :: step = 0, time_ns = 0, attempt = 0, parent_attempt = 0, run_id = 0, tensors = 0, blobs = 0
    type(c_ptr) :: build = c_null_ptr
    integer(c_int) :: ranks = 0, mesh(5) = 0
  end type

  type, bind(c) :: tessera_blob_info
    integer(c_size_t) :: size = 0
    type(c_ptr) :: part = c_null_ptr, name = c_null_ptr
    integer(c_int) :: rank = 0
    type(c_ptr) :: data = c_null_ptr
    integer(c_size_t) :: bytes = 0
  end type

  interface
    integer(c_int) function tessera_status_code(st) bind(c)
      import
      type(c_ptr), value :: st
    end function
    type(c_ptr) function tessera_status_message(st) bind(c)
      import
      type(c_ptr), value :: st
    end function
    integer(c_int) function tessera_status_rank(st) bind(c)
      import
      type(c_ptr), value :: st
    end function
    subroutine tessera_status_free(st) bind(c)
      import
      type(c_ptr), value :: st
    end subroutine

    type(c_ptr) function tessera_open(o, t) bind(c)
      import
      type(tessera_options), intent(in) :: o
      type(c_ptr), intent(inout) :: t
    end function
    type(c_ptr) function tessera_close(t) bind(c)
      import
      type(c_ptr), value :: t
    end function

    type(c_ptr) function tessera_state_new(t, s) bind(c)
      import
      type(c_ptr), value :: t
      type(c_ptr), intent(inout) :: s
    end function
    subroutine tessera_state_free(s) bind(c)
      import
      type(c_ptr), value :: s
    end subroutine
    type(c_ptr) function tessera_state_add_tensor(s, d) bind(c)
      import
      type(c_ptr), value :: s
      type(tessera_tensor), intent(in) :: d
    end function
    type(c_ptr) function tessera_state_add_blob(s, part, name, per_rank, data, bytes) bind(c)
      import
      type(c_ptr), value :: s
      character(kind=c_char), intent(in) :: part(*), name(*)
      integer(c_int), value :: per_rank
      type(c_ptr), value :: data
      integer(c_size_t), value :: bytes
    end function

    type(c_ptr) function tessera_save(t, s, step) bind(c)
      import
      type(c_ptr), value :: t, s
      integer(c_int64_t), value :: step
    end function
    type(c_ptr) function tessera_fence(t, addr, bytes, stream) bind(c)
      import
      type(c_ptr), value :: t, addr
      integer(c_size_t), value :: bytes
      type(c_ptr), value :: stream
    end function
    type(c_ptr) function tessera_tick(t, io) bind(c)
      import
      type(c_ptr), value :: t
      type(tessera_tick_io), intent(inout) :: io
    end function
    type(c_ptr) function tessera_wait(t, committed) bind(c)
      import
      type(c_ptr), value :: t
      integer(c_int64_t), intent(inout) :: committed
    end function
    type(c_ptr) function tessera_cancel(t) bind(c)
      import
      type(c_ptr), value :: t
    end function

    type(c_ptr) function tessera_mark(t, step, metric, value) bind(c)
      import
      type(c_ptr), value :: t
      integer(c_int64_t), value :: step
      character(kind=c_char), intent(in) :: metric(*)
      real(c_double), value :: value
    end function

    type(c_ptr) function tessera_find(t, at_most, step) bind(c)
      import
      type(c_ptr), value :: t
      integer(c_int64_t), value :: at_most
      integer(c_int64_t), intent(inout) :: step
    end function
    type(c_ptr) function tessera_blob(t, part, name, rank, data, bytes) bind(c)
      import
      type(c_ptr), value :: t
      character(kind=c_char), intent(in) :: part(*), name(*)
      integer(c_int), value :: rank
      type(c_ptr), intent(inout) :: data
      integer(c_size_t), intent(inout) :: bytes
    end function
    type(c_ptr) function tessera_stored(t, part, name, d) bind(c)
      import
      type(c_ptr), value :: t
      character(kind=c_char), intent(in) :: part(*), name(*)
      type(tessera_tensor), intent(inout) :: d
    end function
    type(c_ptr) function tessera_list_steps(t, step, room, count) bind(c)
      import
      type(c_ptr), value :: t
      integer(c_int64_t), intent(inout) :: step(*)
      integer(c_size_t), value :: room
      integer(c_size_t), intent(inout) :: count
    end function
    type(c_ptr) function tessera_get_step(t, out) bind(c)
      import
      type(c_ptr), value :: t
      type(tessera_step), intent(inout) :: out
    end function
    type(c_ptr) function tessera_stored_at(t, i, d) bind(c) ! i counts from 0
      import
      type(c_ptr), value :: t
      integer(c_int64_t), value :: i
      type(tessera_tensor), intent(inout) :: d
    end function
    type(c_ptr) function tessera_blob_at(t, i, b) bind(c) ! i counts from 0
      import
      type(c_ptr), value :: t
      integer(c_int64_t), value :: i
      type(tessera_blob_info), intent(inout) :: b
    end function
    type(c_ptr) function tessera_load_parts(t, s, step, o) bind(c)
      import
      type(c_ptr), value :: t, s
      integer(c_int64_t), value :: step
      type(tessera_load_options), intent(in) :: o
    end function
    type(c_ptr) function tessera_reshard(t, from, to, o) bind(c)
      import
      type(c_ptr), value :: t, from, to
      type(tessera_load_options), intent(in) :: o
    end function
    type(c_ptr) function tessera_load_name(t, list, i) bind(c) ! see tessera_text; i counts from 0
      import
      type(c_ptr), value :: t
      integer(c_int), value :: list
      integer(c_int64_t), value :: i
    end function
    type(c_ptr) function tessera_load(t, s, step) bind(c)
      import
      type(c_ptr), value :: t, s
      integer(c_int64_t), value :: step
    end function
    type(c_ptr) function tessera_load_newest(t, s, step) bind(c)
      import
      type(c_ptr), value :: t, s
      integer(c_int64_t), intent(inout) :: step
    end function
    type(c_ptr) function tessera_rewind(t, step) bind(c)
      import
      type(c_ptr), value :: t
      integer(c_int64_t), value :: step
    end function
  end interface

contains

  ! The text of an error; "" for c_null_ptr.
  function tessera_message(st) result(text)
    type(c_ptr), intent(in) :: st
    character(len=:), allocatable :: text
    text = tessera_text(tessera_status_message(st))
  end function

  ! A text of the library's; "" for c_null_ptr.
  function tessera_text(p) result(text)
    type(c_ptr), intent(in) :: p
    character(len=:), allocatable :: text
    character(kind=c_char), pointer :: c(:)
    integer :: n
    text = ''
    if (.not. c_associated(p)) return
    call c_f_pointer(p, c, [65536])
    do n = 1, size(c)
      if (c(n) == c_null_char) exit
      text = text // c(n)
    end do
  end function

end module
