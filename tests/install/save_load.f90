! save_load.c in Fortran: the same table in the same files, so each of the two loads what the other saved.
!
!     mpif90 -o save_load $(pkg-config --variable=datadir tessera)/tessera.f90 save_load.f90 $(pkg-config --libs tessera)
program save_load
  use mpi
  use tessera
  implicit none
  integer, parameter :: rows = 1001, cols = 7
  character(len=4096), target :: url
  character(len=6), target :: part = 'model' // c_null_char, name = 'table' // c_null_char
  real(c_double), allocatable, target :: mine(:, :)
  type(tessera_options) :: o
  type(tessera_tensor) :: a
  type(c_ptr) :: t, s, st
  integer(c_int64_t) :: step
  integer :: rank, ranks, first, last, i, j, wrong, ierr

  call MPI_Init(ierr)
  call MPI_Comm_rank(MPI_COMM_WORLD, rank, ierr)
  call MPI_Comm_size(MPI_COMM_WORLD, ranks, ierr)
  first = rows * rank / ranks + 1
  last = rows * (rank + 1) / ranks
  allocate (mine(cols, first:last)) ! this rank's rows of the table: the fast index comes first
  wrong = 0

  url = 'table'
  if (command_argument_count() > 0) call get_command_argument(1, url)
  url = trim(url) // c_null_char
  o%size = c_sizeof(o)
  o%url = c_loc(url)
  o%mpi_comm = MPI_COMM_WORLD
  call check(tessera_open(o, t))

  call check(tessera_state_new(t, s))
  a%size = c_sizeof(a)
  a%part = c_loc(part)
  a%name = c_loc(name)
  a%dtype = TESSERA_F64
  a%ndim = 2
  a%shape(1:2) = [rows, cols] ! C's order: rows of cols elements
  a%offset(1:2) = [first - 1, 0]
  a%length(1:2) = [last - first + 1, cols]
  a%data = c_loc(mine)
  call check(tessera_state_add_tensor(s, a))

  st = tessera_load_newest(t, s, step)
  if (tessera_status_code(st) == TESSERA_NOT_FOUND) then
    call tessera_status_free(st)
    do i = first, last
      mine(:, i) = [(real((i - 1) * cols + j - 1, c_double), j = 1, cols)]
    end do
    call check(tessera_save(t, s, 1_c_int64_t))
    call check(tessera_fence(t, c_null_ptr, 0_c_size_t, c_null_ptr))
    mine = -1
    call check(tessera_wait(t, step))
  else
    call check(st)
    do i = first, last
      wrong = wrong + count(mine(:, i) /= [(real((i - 1) * cols + j - 1, c_double), j = 1, cols)])
    end do
  end if
  print '(4(a, i0), a)', 'rank ', rank, ' of ', ranks, ': step ', step, ', ', wrong, ' elements wrong'

  call tessera_state_free(s)
  call check(tessera_close(t))
  call MPI_Finalize(ierr)
  if (wrong /= 0) stop 1

contains

  subroutine check(status)
    type(c_ptr), intent(in) :: status
    if (.not. c_associated(status)) return
    print '(a)', 'save_load: ' // tessera_message(status)
    call MPI_Abort(MPI_COMM_WORLD, 1, ierr)
  end subroutine

end program
